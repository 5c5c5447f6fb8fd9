"""What a run is asked to be, by flags, by the YAML and by code, and which of them wins."""
