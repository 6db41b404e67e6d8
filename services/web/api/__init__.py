"""The HTTP API: thin handlers over `headway.lifecycle` and `headway.store`."""
