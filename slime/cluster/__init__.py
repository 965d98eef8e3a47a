"""Ray: a cluster joined or started, what is placed on it, and waiting with a deadline."""
