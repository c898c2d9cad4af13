"""From raw documents to batches of packed token rows; `loader` alone needs grain."""
