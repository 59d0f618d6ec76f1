"""Methods x seeds x settings: matched runs, their table with its uncertainty, and a folder that repeats them."""
