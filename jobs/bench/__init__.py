"""How fast it is here, beside what it is measured against."""
