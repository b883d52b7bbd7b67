"""The HTTP gateway: accepts heartbeats and serves minute-level heart rate. Only it knows HTTP."""
