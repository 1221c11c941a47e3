"""The dashboard: pages of HTML beside the REST API, by the same guard. They can be read without scripts."""

from durably_connectors.http.dashboard.pages import front, public, router, static

__all__ = ["front", "public", "router", "static"]
