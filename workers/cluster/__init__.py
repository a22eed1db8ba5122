"""All that concerns Ray and not K-FAC: clusters, their guard, job submissions, and leftovers."""
