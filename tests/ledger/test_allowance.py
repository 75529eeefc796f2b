"""How tokens share an account's credit: never more than there is, and by the policy that is data."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.ledger.allowance import (
    PHONE,
    PLASTIC,
    SOFTWARE_PHONE,
    AllowancePolicy,
    Candidate,
    FormPolicy,
    allot,
    shares_minor,
)
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.reserve import interval_set, measure, union

candidates = st.lists(
    st.builds(
        Candidate,
        claim=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4).map(interval_set),
        highest=st.integers(0, 60),
        assurance=st.integers(1, 3),
        recent_taps=st.integers(0, 100),
    ),
    max_size=4,
)
policies = st.builds(
    AllowancePolicy,
    forms=st.dictionaries(
        st.integers(1, 3),
        st.builds(FormPolicy, share_percent=st.integers(0, 100), weight_percent=st.integers(1, 300)),
    ),
    recent_days=st.just(30),
    use_percent=st.integers(0, 100),
    least_minor=st.integers(0, 50),
)


@given(candidates, policies, st.integers(0, 300), st.integers(0, 100), st.integers(-20, 300))
def test_no_policy_gives_more_than_there_is(
    tokens: list[Candidate], policy: AllowancePolicy, owable: int, percent: int, free: int
) -> None:
    shares = shares_minor(tokens, owable_minor=owable, share_percent=percent, policy=policy)
    assert sum(shares) <= owable
    if policy.least_minor == 0:
        assert sum(shares) <= owable * percent // 100
    ceilings = allot(tokens, shares, free_minor=free)
    given_out = 0
    for token, ceiling, share in zip(tokens, ceilings, shares, strict=True):
        assert token.highest <= ceiling <= token.highest + share
        after = union(token.claim, interval_set([(token.highest, ceiling)]))
        given_out += measure(after) - measure(token.claim)
        assert measure(after) <= max(share, measure(token.claim))
    assert given_out <= max(free, 0)


def test_a_phone_leaves_more_to_plastic_and_use_counts() -> None:
    policy = AllowancePolicy(
        forms={PHONE: FormPolicy(share_percent=30), SOFTWARE_PHONE: FormPolicy(weight_percent=50)},
        recent_days=30,
        use_percent=100,
        most_taps=2,
        least_minor=50,
    )

    def shares(*tokens: tuple[int, int], owable: int = 1000) -> tuple[int, ...]:
        wanted = [Candidate((), 0, assurance, taps) for assurance, taps in tokens]
        return shares_minor(wanted, owable_minor=owable, share_percent=100, policy=policy)

    assert shares((PLASTIC, 0), (PHONE, 0)) == (500, 300)
    assert shares((PHONE, 0)) == (300,)
    assert shares((PLASTIC, 2), (PLASTIC, 0)) == (750, 250)
    assert shares((PLASTIC, 9), (PLASTIC, 0)) == (750, 250)
    assert shares((PLASTIC, 0), (SOFTWARE_PHONE, 0), owable=150) == (100, 50)
    assert shares((PLASTIC, 0), (PLASTIC, 0), owable=60) == (50, 10)
    assert shares(owable=-5) == ()


def test_the_policy_is_data() -> None:
    text = (
        '{"allowance": {"forms": {"3": {"share_percent": 20, "per_tap_cap_minor": 5000}}, "recent_days": 30}}'
    )
    policy = Policy.model_validate_json(text).allowance
    assert policy.per_tap_cap_minor(SOFTWARE_PHONE, 100_000) == 5000
    assert policy.per_tap_cap_minor(SOFTWARE_PHONE, 1000) == 1000
    assert policy.per_tap_cap_minor(PLASTIC, 100_000) == 100_000
    assert Policy.model_validate_json(Policy.model_validate_json(text).model_dump_json()).allowance == policy
