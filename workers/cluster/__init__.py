"""What is Ray's and not K-FAC's: clusters, their guard, submissions, what is left of them."""
