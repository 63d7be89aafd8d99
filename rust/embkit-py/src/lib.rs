//! The Python face of embkit.
