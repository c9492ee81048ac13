"""One folder a question: what is asked, the command, what it cost, what it gave."""
