import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpoe.mpo import SiteDims, site_dims

SIZES = st.integers(min_value=1, max_value=5000)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((3072, 768), ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))),
        ((768, 3072), ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))),
        ((768, 768), ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3))),
        ((4096, 1024), ((4, 4, 8, 8, 4), (4, 4, 4, 4, 4))),
        ((1024, 4096), ((4, 4, 4, 4, 4), (4, 4, 8, 8, 4))),
    ],
)
def test_the_papers_dimensions(size, expected):
    dims = site_dims(*size)
    assert (dims.out_dims, dims.in_dims) == expected


def test_the_papers_numbers_for_t5_base():
    dims = site_dims(3072, 768)
    assert dims.bond_dims() == (1, 12, 192, 384, 16, 1)
    assert dims.num_parameters() == (2_359_296, 184_720)
    assert [math.prod(shape) for shape in dims.site_shapes()] == [144, 36_864, 2_359_296, 147_456, 256]


@given(SIZES, SIZES, st.none() | st.integers(1, 200))
def test_any_size_gets_valid_dimensions(out_features, in_features, cap):
    dims = site_dims(out_features, in_features, max_auxiliary_bond=cap)
    assert 0 <= dims.padded_out - out_features <= out_features / 16
    assert 0 <= dims.padded_in - in_features <= in_features / 16
    assert ("padded" in dims.note) == ((dims.padded_out, dims.padded_in) != (out_features, in_features))
    bonds = dims.bond_dims()
    c = dims.central
    left = math.prod(dims.out_dims[:c]) * math.prod(dims.in_dims[:c])
    right = math.prod(dims.out_dims[c + 1 :]) * math.prod(dims.in_dims[c + 1 :])
    # A full bond beside the centre is the whole of its arm, so the identity gauge needs no decomposition.
    assert (bonds[c], bonds[c + 1]) == (left, right)
    assert max(left, right) <= (cap or left + right)


@given(SIZES, SIZES, st.sampled_from([1, 3, 5, 7, 9]))
def test_fewer_sites_are_said(out_features, in_features, num_sites):
    dims = site_dims(out_features, in_features, num_sites)
    assert dims.num_sites <= num_sites
    assert (dims.num_sites < num_sites) == ("instead of" in dims.note)


def test_a_prime_is_padded_and_a_small_one_falls_back():
    assert site_dims(3071, 768).padded_out == 3072
    assert "outputs padded from 3071 to 3072" in site_dims(3071, 768).note
    assert site_dims(7, 13).num_sites == 1
    assert "num_sites = 1 instead of 5" in site_dims(7, 13).note


def test_the_cap_makes_small_auxiliaries():
    small = site_dims(3072, 768, max_auxiliary_bond=64)
    assert small.bond_dims() == (1, 6, 48, 48, 8, 1)
    # 1·2·3·6, 6·2·4·48, 48·3·2·8 and 8·2·4·1
    assert small.num_parameters() == (2_359_296, 36 + 2304 + 2304 + 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_features": 0, "in_features": 4}, "out_features must be >= 1; got 0"),
        ({"out_features": 4, "in_features": -1}, "in_features must be >= 1; got -1"),
        ({"out_features": 4, "in_features": 4, "num_sites": 4}, "num_sites must be odd"),
        ({"out_features": 4, "in_features": 4, "max_auxiliary_bond": 0}, "max_auxiliary_bond must be >= 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        site_dims(**arguments)


def test_dimensions_that_do_not_multiply_out():
    with pytest.raises(ValueError, match=r"must equal output_features = 768.*got \(4, 4, 8, 5\)|odd number of sites"):
        SiteDims.of(((4, 4, 8, 5), (4, 4, 8, 6)), 768, 768)
    with pytest.raises(ValueError, match=r"output_features = 768 .* = 640\. mpoe\.mpo\.site_dims\(768, 64\)"):
        SiteDims.of(((4, 32, 5), (4, 4, 4)), 768, 64)


def test_huge_matrices_are_cut_in_a_moment():
    """Their divisors are not found by trying every number up to a bond."""
    dims = site_dims(2_391_506_372, 2**31 - 1)
    assert 0 <= dims.padded_out - 2_391_506_372 <= 2_391_506_372 // 16
    with pytest.raises(ValueError, match="out_features must be at most 1099511627776; got 2199023255552"):
        site_dims(2**41, 8)
