"""Our server beside others, in one run on one machine; ``README.md`` says what is measured and how to read it."""
