"""Quantisers: values, gradients, ties, samples, usage, bad input."""

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.modules.quantizers import (
    LatentQuantizer,
    VectorQuantizer,
    codebook_usage,
    straight_through,
)


@pytest.fixture
def codes():
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def uneven():
    return LatentQuantizer(3, [2, 5, 3])


def test_starts_as_an_even_grid_per_latent():
    values = LatentQuantizer(3, 6).values
    assert values.shape == (3, 6)
    assert torch.equal(values, torch.linspace(-0.5, 0.5, 6).expand(3, 6))


def test_takes_the_nearest_value_of_its_own_codebook(codes):
    quantizer = LatentQuantizer(4, 7)
    with torch.no_grad():
        quantizer.values.copy_(torch.randn(4, 7, generator=torch.Generator().manual_seed(1)))
    z, quantized, indices = quantizer(codes)
    for b in range(16):
        for j in range(4):
            k = min(range(7), key=lambda k: abs(codes[b, j] - quantizer.values[j, k]).item())
            assert indices[b, j] == k
            assert quantized[b, j] == quantizer.values[j, k]
    assert torch.equal(z, quantized)


def test_codes_are_codebook_values_to_the_last_bit():
    continuous = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    quantizer = LatentQuantizer(3, 10)
    with torch.no_grad():
        quantizer.values.copy_(continuous[:10].T)
    z, quantized, _ = quantizer(continuous)
    assert not torch.equal(continuous + (quantized - continuous), quantized)  # the usual way of writing it rounds
    assert torch.equal(z, quantized)
    assert all(len(column.unique()) == 10 for column in z.T)


def test_decoder_gradient_is_identity_to_the_encoder_and_zero_to_the_values(codes):
    quantizer = LatentQuantizer(4, 6)
    continuous = codes.requires_grad_()
    upstream = torch.randn(16, 4)
    z = quantizer(continuous).z
    to_encoder, to_values = torch.autograd.grad(z, (continuous, quantizer.values), upstream, allow_unused=True)
    assert torch.equal(to_encoder, upstream)
    assert to_values is None


def test_jacobian_of_straight_through_is_identity():
    jacobian = torch.autograd.functional.jacobian(lambda c: straight_through(c, c.round()), torch.randn(5))
    assert torch.equal(jacobian, torch.eye(5))


def test_gradient_reaches_only_the_values_that_were_taken():
    quantizer = LatentQuantizer(2, 3)
    quantizer(torch.tensor([[-0.4, 0.6], [-0.45, 0.1]])).quantized.sum().backward()
    assert torch.equal(quantizer.values.grad, torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))


def test_ties_go_to_the_lower_index():
    quantizer = LatentQuantizer(1, 3)  # -0.5, 0, 0.5
    assert quantizer(torch.tensor([[-0.25], [0.25]])).indices.tolist() == [[0], [1]]
    with torch.no_grad():
        quantizer.values.copy_(torch.tensor([[0.5, 0.5, -0.5]]))
    assert quantizer(torch.tensor([[0.4], [0.0]])).indices.tolist() == [[0], [0]]
    vectors = VectorQuantizer(1, 3, 2)
    with torch.no_grad():
        vectors.vectors.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]))
    assert vectors(torch.tensor([[0.0, 3.0], [2.0, 0.0]])).indices.tolist() == [[0], [0]]


def test_uneven_codebooks_never_use_their_filling(uneven):
    z, _, indices = uneven(torch.zeros(1, 3))
    assert z.tolist() == [[-0.5, 0.0, 0.0]]
    assert indices.tolist() == [[0, 2, 1]]
    _, indices = uneven.sample(2000, generator=torch.Generator().manual_seed(0))
    assert indices.amin(0).tolist() == [0, 0, 0]
    assert indices.amax(0).tolist() == [1, 4, 2]


def test_shared_codebook_equals_equal_codebooks_with_summed_gradient(codes):
    own, shared = LatentQuantizer(4, 5), LatentQuantizer(4, 5, shared=True)
    assert shared.values.shape == (1, 5)
    assert torch.equal(own(codes).indices, shared(codes).indices)
    own(codes).quantized.square().sum().backward()
    shared(codes).quantized.square().sum().backward()
    assert torch.allclose(shared.values.grad, own.values.grad.sum(0, keepdim=True))


def test_fixed_values_are_no_parameters_but_are_saved():
    quantizer = LatentQuantizer(3, 4, learned=False)
    assert list(quantizer.parameters()) == []
    assert list(quantizer.state_dict()) == ["values"] == list(LatentQuantizer(3, 4).state_dict())


def test_samples_are_uniform_and_train_the_values():
    quantizer = LatentQuantizer(2, 4)
    z, indices = quantizer.sample(8000, generator=torch.Generator().manual_seed(0))
    assert (quantizer.usage(indices).counts - 2000).abs().max() < 200  # 5 standard deviations
    assert torch.equal(z, quantizer.lookup(indices))
    z.sum().backward()
    assert torch.equal(quantizer.values.grad, quantizer.usage(indices).counts.float())
    again, _ = quantizer.sample(8000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z, again)


def test_traversal_moves_one_latent_over_its_values_in_order():
    quantizer = LatentQuantizer(3, [3, 2, 3])
    with torch.no_grad():
        quantizer.values[2] = torch.tensor([0.3, -0.2, 0.1])
    start = torch.tensor([[0, 1, 0], [2, 0, 1]])
    codes = quantizer.traverse(start, 2)
    assert codes.shape == (3, 2, 3)
    assert torch.allclose(codes[:, 0, 2], torch.tensor([-0.2, 0.1, 0.3]))
    assert torch.equal(codes[:, :, :2], quantizer.lookup(start)[:, :2].expand(3, 2, 2))
    assert quantizer.traverse(start, 1).shape == (2, 2, 3)


def test_usage_counts_values():
    usage = codebook_usage(torch.tensor([[0, 2], [1, 2], [0, 2], [1, 2]]), [4, 3])
    assert usage.counts.tolist() == [[2, 2, 0, 0], [0, 0, 4, 0]]
    assert torch.allclose(usage.fraction, torch.tensor([0.5, 1 / 3]))
    assert torch.allclose(usage.perplexity, torch.tensor([2.0, 1.0]))
    assert LatentQuantizer(3, 2, shared=True).usage(torch.zeros(5, 3, dtype=torch.long)).counts.shape == (3, 2)


def test_vectors_are_nearest_in_squared_distance():
    quantizer = VectorQuantizer(3, 11, 4)
    continuous = torch.randn(6, 12, requires_grad=True)
    z, quantized, indices = quantizer(continuous)
    distance = (continuous.view(6, 3, 1, 4) - quantizer.vectors).square().sum(-1)
    assert torch.equal(indices, distance.argmin(-1))
    assert torch.equal(quantized, quantizer.vectors[indices].flatten(1))
    upstream = torch.randn(6, 12)
    to_encoder, to_vectors = torch.autograd.grad(
        z, (continuous, quantizer.vectors), upstream, allow_unused=True, retain_graph=True
    )
    assert torch.equal(to_encoder, upstream)
    assert to_vectors is None
    quantized.sum().backward()
    assert torch.equal(quantizer.vectors.grad[:, 0].long(), quantizer.usage(indices).counts.sum(0))


def test_vectors_start_with_unit_expected_squared_norm():
    torch.manual_seed(0)
    assert VectorQuantizer(1, 4000, 64).vectors.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)


def test_forward_compiles_without_graph_breaks(codes):
    quantizer = LatentQuantizer(4, 6)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(codes), quantizer(codes), strict=True))


def test_reduced_precision_codes_are_compared_in_full():
    continuous = torch.tensor([[0.3]], dtype=torch.bfloat16, requires_grad=True)
    z = LatentQuantizer(1, 10)(continuous).z
    assert z.dtype == torch.float32
    z.sum().backward()
    assert continuous.grad.dtype == torch.bfloat16
    assert continuous.grad.item() == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LatentQuantizer(3, 1), "at least 2 values"),
        (lambda: LatentQuantizer(3, [4, 4, 1]), "at least 2 values"),
        (lambda: LatentQuantizer(3, [4, 4]), "2 sizes for 3 latents"),
        (lambda: LatentQuantizer(0, 4), "at least 1 latent"),
        (lambda: LatentQuantizer(3, [4, 4, 4], shared=True), "single number"),
        (lambda: LatentQuantizer(3, 4)(torch.zeros(2, 4)), "num_outputs 3"),
        (lambda: VectorQuantizer(3, 1, 4), "at least 2 vectors"),
        (lambda: VectorQuantizer(3, 4, 0), "at least 1"),
        (lambda: VectorQuantizer(3, 4, 2)(torch.zeros(2, 3)), "num_outputs 6"),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(UserError, match=words):
        make()
