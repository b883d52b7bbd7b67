"""The HTTP gateway: heartbeats in, minute-level readings out. The only place that knows HTTP."""
