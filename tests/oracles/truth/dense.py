"""Dense truth for small models in float64: slow and obvious, written apart from the library.

Vectors run over the trainable parameters in `named_parameters()` order, each flattened by rows.
Matrices over parameters are means over cases of per-case quantities. `name` is the name of a
predictive distribution: bernoulli, categorical or gaussian.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def reference_loss(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return -log r(targets | outputs) of one case from torch's own losses, a scalar."""
    if name == "bernoulli":
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    if name == "categorical":
        classes = outputs.shape[-1]
        return nn.functional.cross_entropy(
            outputs.reshape(-1, classes), targets.reshape(-1), reduction="sum"
        )
    return 0.5 * nn.functional.mse_loss(outputs, targets, reduction="sum")


def batch_loss(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over cases of the reference loss, case by case."""
    losses = [
        reference_loss(name, model(inputs[n : n + 1]), targets[n : n + 1])
        for n in range(len(inputs))
    ]
    return torch.stack(losses).sum()


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def per_case_gradients(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of each case's loss, [N, P]."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for n in range(len(inputs)):
        loss = reference_loss(name, model(inputs[n : n + 1]), targets[n : n + 1])
        gradients = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def output_jacobian(model: nn.Module, case: Tensor) -> Tensor:
    """Return the Jacobian of the flattened outputs of one case [1, ...], [outputs, P]."""
    values = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def outputs_of(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (case,)).flatten()

    with sdpa_kernel(SDPBackend.MATH):  # fused attention does not support vmap
        jacobians = torch.func.jacrev(outputs_of)(values)
    return torch.cat([jacobians[k].flatten(start_dim=1) for k in values], dim=1)


def output_fisher(name: str, outputs: Tensor) -> Tensor:
    """Return the Fisher matrix of the outputs of one case [...], dense over all of them."""
    size = outputs.numel()
    if name == "gaussian":
        return torch.eye(size, dtype=outputs.dtype)
    if name == "bernoulli":
        p = torch.sigmoid(outputs.flatten())
        return torch.diag(p * (1 - p))
    classes = outputs.shape[-1]
    full = torch.zeros(size, size, dtype=outputs.dtype)
    for position, logits in enumerate(outputs.reshape(-1, classes)):
        p = torch.softmax(logits, dim=0)
        at = slice(position * classes, (position + 1) * classes)
        full[at, at] = torch.diag(p) - torch.outer(p, p)
    return full


def output_hessian(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the Hessian of the reference loss in the outputs of one case, by autograd."""

    def loss_of(flat: Tensor) -> Tensor:
        return reference_loss(name, flat.reshape(outputs.shape)[None], targets[None])

    return torch.func.hessian(loss_of)(outputs.flatten())


def fisher(name: str, model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the exact Fisher of all parameters, mean over cases of J^T H J, [P, P]."""
    total = torch.zeros(num_parameters(model), num_parameters(model), dtype=torch.float64)
    for n in range(len(inputs)):
        case = inputs[n : n + 1]
        jacobian = output_jacobian(model, case)
        total += jacobian.T @ output_fisher(name, model(case)[0].detach()) @ jacobian
    return total / len(inputs)


def empirical_fisher(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over cases of the outer product of each gradient, [P, P]."""
    gradients = per_case_gradients(name, model, inputs, targets)
    total = torch.zeros(gradients.shape[1], gradients.shape[1], dtype=gradients.dtype)
    for gradient in gradients:
        total += torch.outer(gradient, gradient)
    return total / len(inputs)


def objective(name: str, model: nn.Module, inputs: Tensor, targets: Tensor, l2: float) -> float:
    """Return h: the mean loss of a case plus l2 / 2 times the squared norm of the parameters."""
    mean = batch_loss(name, model, inputs, targets).item() / len(inputs)
    return mean + 0.5 * l2 * parameter_vector(model).square().sum().item()


def _cut_at(model: nn.Sequential, layer: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules up to and with a layer's predecessor, and those behind the layer."""
    names = [name for name, _ in model.named_children()]
    modules = list(model.children())
    return modules[: names.index(layer)], modules[names.index(layer) + 1 :]


def layer_input(model: nn.Sequential, layer: str, case: Tensor) -> Tensor:
    """Return the homogeneous inputs of a layer for one case [1, ...], [positions, dim_A]."""
    activity = case
    for module in _cut_at(model, layer)[0]:
        activity = module(activity)
    rows = activity.detach().reshape(-1, activity.shape[-1])
    if model.get_submodule(layer).bias is None:
        return rows
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)


def layer_output_jacobian(model: nn.Sequential, layer: str, case: Tensor) -> Tensor:
    """Return the Jacobian of all outputs in a layer's outputs, [outputs, positions, dim_G]."""
    before, behind = _cut_at(model, layer)
    activity = case
    for module in [*before, model.get_submodule(layer)]:
        activity = module(activity)

    def outputs_of(layer_output: Tensor) -> Tensor:
        for module in behind:
            layer_output = module(layer_output)
        return layer_output.flatten()

    jacobian = torch.func.jacrev(outputs_of)(activity.detach()).detach()
    return jacobian.reshape(len(jacobian), -1, activity.shape[-1])


def input_factor(model: nn.Sequential, layer: str, inputs: Tensor) -> Tensor:
    """Return A: the mean over cases of the mean over positions of abar abar^T."""
    total = 0.0
    for n in range(len(inputs)):
        rows = layer_input(model, layer, inputs[n : n + 1])
        total = total + sum(torch.outer(row, row) for row in rows) / len(rows)
    return total / len(inputs)


def exact_output_factor(name: str, model: nn.Sequential, layer: str, inputs: Tensor) -> Tensor:
    """Return the exact-type G: the mean over cases of the sum over positions of J^T H J."""
    total = 0.0
    for n in range(len(inputs)):
        case = inputs[n : n + 1]
        H = output_fisher(name, model(case)[0].detach())
        jacobian = layer_output_jacobian(model, layer, case)
        for position in range(jacobian.shape[1]):
            J = jacobian[:, position]
            total = total + J.T @ H @ J
    return total / len(inputs)


def empirical_output_factor(
    name: str, model: nn.Sequential, layer: str, inputs: Tensor, targets: Tensor
) -> Tensor:
    """Return the empirical G: the mean over cases of the sum over positions of g g^T."""
    total = 0.0
    for n in range(len(inputs)):
        case = inputs[n : n + 1]
        outputs = model(case).detach().requires_grad_()
        loss = reference_loss(name, outputs, targets[n : n + 1])
        (derivative,) = torch.autograd.grad(loss, outputs)
        jacobian = layer_output_jacobian(model, layer, case)
        for position in range(jacobian.shape[1]):
            g = jacobian[:, position].T @ derivative.flatten()
            total = total + torch.outer(g, g)
    return total / len(inputs)


def homogeneous_matrix(vector: Tensor, model: nn.Module, layer: str) -> Tensor:
    """Return a Linear layer's part of `vector` [P] as [dim_G, dim_A], the bias last."""
    at = layer_indices(model, layer, "rows").reshape(model.get_submodule(layer).out_features, -1)
    return vector[at]


def layer_indices(model: nn.Module, layer: str, order: str) -> Tensor:
    """Return the places in the vector of the elements of a layer's [W, b], in a vec `order`.

    With `rows` they are in the order of `[W, b].flatten()`, with `columns` in that of the paper's
    vec.
    """
    offsets, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            offsets[name] = start
            start += parameter.numel()
    module = model.get_submodule(layer)
    rows = []
    for r in range(module.out_features):
        row = [
            offsets[f"{layer}.weight"] + r * module.in_features + c
            for c in range(module.in_features)
        ]
        if module.bias is not None:
            row.append(offsets[f"{layer}.bias"] + r)
        rows.append(row)
    matrix = torch.tensor(rows)
    return matrix.flatten() if order == "rows" else matrix.T.flatten()


def layer_block(matrix: Tensor, model: nn.Module, layer: str, order: str) -> Tensor:
    """Return the diagonal block of a layer in `matrix` [P, P], in a vec order."""
    at = layer_indices(model, layer, order)
    return matrix[at][:, at]


def kron(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product: block (i, j) is left[i, j] * right."""
    rows = []
    for i in range(left.shape[0]):
        rows.append(torch.cat([left[i, j] * right for j in range(left.shape[1])], dim=1))
    return torch.cat(rows)


def kronecker_block(A: Tensor, G: Tensor, order: str) -> Tensor:
    """Return the layer block that A and G stand for: `G (x) A` by rows, `A (x) G` by columns."""
    return kron(G, A) if order == "rows" else kron(A, G)


def split_damping(A: Tensor, G: Tensor, norm: str = "trace") -> float:
    """Return pi (docs/algorithm.md#factored-damping) for two factors that are not zero."""
    if norm == "trace":
        of_A = sum(A[i, i].item() for i in range(len(A))) / len(A)
        of_G = sum(G[i, i].item() for i in range(len(G))) / len(G)
    else:
        of_A = A.square().sum().item() ** 0.5 / len(A) ** 0.5
        of_G = G.square().sum().item() ** 0.5 / len(G) ** 0.5
    return (of_A / of_G) ** 0.5


def damped_block(A: Tensor, G: Tensor, gamma: float, order: str, norm: str = "trace") -> Tensor:
    """Return the dense Kronecker product of the damped factors."""
    pi = split_damping(A, G, norm)
    A_damped = A + pi * gamma * torch.eye(len(A), dtype=A.dtype)
    G_damped = G + gamma / pi * torch.eye(len(G), dtype=G.dtype)
    return kronecker_block(A_damped, G_damped, order)


def preconditioned_cg(
    matrix: Tensor,
    right_side: Tensor,
    start: Tensor,
    solve: Callable[[Tensor], Tensor],
    num_steps: int,
) -> list[Tensor]:
    """Solve matrix x = right_side by the textbook method; return the iterates after `start`.

    `solve` applies the inverse of the preconditioner.
    """
    x, iterates = start, []
    residual = right_side - matrix @ x
    z = solve(residual)
    direction = z
    for _ in range(num_steps):
        product = matrix @ direction
        alpha = (residual @ z) / (direction @ product)
        x = x + alpha * direction
        new_residual = residual - alpha * product
        new_z = solve(new_residual)
        beta = (new_residual @ new_z) / (residual @ z)
        direction = new_z + beta * direction
        residual, z = new_residual, new_z
        iterates.append(x)
    return iterates
