"""Who asks, whether they may, and how much: API keys, scopes, rate limits."""
