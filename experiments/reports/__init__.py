"""Tables, figures, claims and pages: what experiments show. Everything here reads run folders and trains nothing."""
