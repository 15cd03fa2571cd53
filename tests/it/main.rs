//! The whole repository and the whole system from outside.

mod tidy;
