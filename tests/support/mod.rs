//! What the numerical tests share: fixtures, open models with probes, goldens, conversations.

#![allow(
    dead_code,
    unused_macros,
    reason = "each test binary uses its part of what is shared here"
)]

pub(crate) mod conversation;
pub(crate) mod forms;
pub(crate) mod goldens;
pub(crate) mod models;
pub(crate) mod packed;
pub(crate) mod parts;
pub(crate) mod patches;
pub(crate) mod reports;

/// Makes a test for every fixture out of `fn check(fixture: &str)`, in a module of the same name, so
/// that a failure names its fixture and fixtures run side by side.
macro_rules! on_every_fixture {
    ($($check:ident),* $(,)?) => {
        $(mod $check {
            on_every_fixture! { @ $check
                ts_eager_mha = 0, ts_eager_gqa = 1, ts_sdpa_mha = 2, ts_sdpa_gqa = 3, dynamo18_mha = 4,
                dynamo18_gqa = 5, dynamo23_mha = 6, dynamo23_gqa = 7, demo = 8,
            }
        })*
    };
    (@ $check:ident $($test:ident = $index:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            let name = $crate::support::models::FIXTURES[$index];
            assert_eq!(name.replace('-', "_"), stringify!($test));
            super::$check(name);
        })*

        #[test]
        fn no_fixture_is_left_out() {
            let tests = [$(stringify!($test)),*];
            assert_eq!(tests.len(), $crate::support::models::FIXTURES.len());
            let folder = $crate::support::models::root().join("models/llava/fixtures");
            assert_eq!(std::fs::read_dir(folder).expect("fixtures").count(), tests.len());
        }
    };
}
