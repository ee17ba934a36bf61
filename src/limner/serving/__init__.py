"""Jobs that survive a kill, the worker that draws them, and the HTTP routes to them."""
