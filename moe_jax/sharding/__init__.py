"""Where arrays live: meshes of devices, and tables from logical axes to mesh axes."""
