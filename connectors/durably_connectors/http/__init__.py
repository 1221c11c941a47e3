"""The gateway: REST, webhooks, server-sent events and a dashboard, as one ASGI application."""

from durably_connectors.http.app import create_gateway
from durably_connectors.http.server import GatewayThread, local_gateway, serve

__all__ = ["GatewayThread", "create_gateway", "local_gateway", "serve"]
