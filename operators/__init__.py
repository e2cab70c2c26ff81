"""The operators that rules name; the registry imports each one lazily."""
