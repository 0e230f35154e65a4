//! Typed indices into a [`Model`](super::Model)'s arenas.
//!
//! Their `Display` is what the text form and error messages print. Ids are
//! never reused: a removed node leaves a hole, so an id taken before a patch
//! stays valid after it.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(pub(in crate::ir) u32);

        impl $name {
            /// The position in the arena.
            pub fn index(self) -> usize {
                self.0 as usize
            }

            pub(in crate::ir) fn new(index: usize) -> Self {
                Self(u32::try_from(index).expect("an arena holds fewer than 2^32 elements"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A node of any graph or function of the model.
    NodeId, "n"
);
id!(
    /// A value (edge) of any graph: input, initializer or node output.
    ValueId, "%"
);
id!(
    /// The main graph, a sub-graph held by an attribute, or a function body.
    GraphId, "g"
);
