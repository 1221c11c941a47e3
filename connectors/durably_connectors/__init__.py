"""The edges of durably: what connects it to HTTP and to other stream processors."""
