"""The record and its rules: what a heartbeat is, its schemas, its days, settings and errors."""
