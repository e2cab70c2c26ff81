"""What machine this is, or what machine a dump shows. Imports no torch."""
