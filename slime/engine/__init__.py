"""SGLang: servers and the host agents that run them, a typed client, routing."""
