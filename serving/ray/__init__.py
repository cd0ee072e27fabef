"""A Ray Serve application that serves a bundle. Only `app`, `ingress` and `request_router` import Ray."""
