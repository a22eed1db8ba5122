"""The mathematics of K-FAC: torch only; no Ray, gRPC, threads, clock or environment.

Read `compute` first: it is what one worker computes from its part of a batch. Then follow a step
through the folders:

    blocks       which parameters form which curvature block, and the rule for each type of layer
    passes       passes over the model: observed calls, sampled targets, exact Fisher products
    statistics   sums over cases of the factors of every block
    factors      their running averages (a module beside the folders)
    inverse      damped inverses, by structure, and the directions they give
    step         step size, momentum, damping, gamma and averaging

`packing`, `products` and `vector` are tools. The README beside this file has the notation and says
which function computes which equation.
"""
