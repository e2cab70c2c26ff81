"""The `numagraft` command."""
