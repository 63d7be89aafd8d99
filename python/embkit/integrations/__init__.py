"""embkit's parts in other packages' trainers; each needs the package whose name it has."""
