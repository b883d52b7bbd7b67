"""Health, metrics, and the probes behind them."""
