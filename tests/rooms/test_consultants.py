"""Room 11, Consultants."""

import pytest

from shimmercat import (
    ConsultantSettings,
    DomainSettings,
    NetworkAddress,
    consultant_of,
)

PORT = NetworkAddress.parse("8080")


def domain(*names):
    return DomainSettings("a.example", "elec", "devlove.yaml:3", consultants={
        name: ConsultantSettings(name, (PORT,)) for name in names})


@pytest.mark.parametrize("names, expected", [
    ([], None),
    (["default"], "default"),
    (["shop"], "shop"),
    (["shop", "default"], "default"),
    (["shop", "blog"], None),
])
def test_an_electric_domain_is_answered_by_one_consultant(names, expected):
    consultant = consultant_of(domain(*names))
    assert (consultant and consultant.name) == expected


def test_an_api_domain_is_answered_by_its_port():
    settings = DomainSettings("api.example", "api", "devlove.yaml:5",
                              port=PORT)
    consultant = consultant_of(settings)
    assert consultant.connect_to == (PORT,)
    assert consultant.name == "api.example"
