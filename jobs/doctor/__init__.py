"""Whether everything is there that a training needs."""
