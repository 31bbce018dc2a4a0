"""Where jobs run: the connection to Ray, and manifests for clusters."""
