from __future__ import annotations

import pytest
from weights_samples import PAIRS, random_network

from quasr.weights.layout import PREFIXES, checkpoint_name, name_table


@pytest.mark.parametrize(("parameter", "names"), PAIRS.items())
def test_published_names(parameter: str, names: tuple[str, str]) -> None:
    assert (checkpoint_name(parameter, "original"), checkpoint_name(parameter, "hf")) == names


@pytest.mark.parametrize("layout", PREFIXES)
def test_every_parameter_has_a_name_of_its_own(layout: str) -> None:
    parameters = list(random_network(tied=False).state_dict())
    assert set(PAIRS) <= set(parameters)
    assert len(set(name_table(parameters, layout).values())) == len(parameters)


def test_a_name_that_is_no_parameter() -> None:
    with pytest.raises(KeyError):
        checkpoint_name("vision.weight", "hf")
