"""Coverage-guided fuzzing of everything that reads a stranger's file: rules, templates, plans, imported rules."""
