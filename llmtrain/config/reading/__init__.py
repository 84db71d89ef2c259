"""From YAML files and overrides to a checked configuration, and back to text."""
