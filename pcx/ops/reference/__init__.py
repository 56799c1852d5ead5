"""Every op in plain torch: the tests' oracle, the backend that runs anywhere, what is exported."""
