"""Rule files: text in, RuleSet out."""
