"""What is measured: a module a suite, each with `cells(choice)`."""
