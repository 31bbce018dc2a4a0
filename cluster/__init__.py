"""Connection to Ray, and manifests for clusters."""
