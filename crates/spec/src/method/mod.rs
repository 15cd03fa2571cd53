//! What a method is, seen without its types: its card, its JSON Schema, its place in a list.
//!
//! A method's types stay in its own file in the training half. What leaves that file is a [`Card`] (data), a JSON Schema
//! and default parameters; together they are one [`document::MethodDocument`], committed as `methods/<name>.json`, from
//! which validation, the command line, the API and the documentation are all fed.

pub mod card;
pub mod catalogue;
pub mod document;
pub mod expression;
pub mod filter;
pub mod registry;
pub mod schema;

pub use card::{Card, Category, LAYERS, Merges, Paper, Point, Rule, SiteKind};
pub use catalogue::Catalogue;
pub use document::{ManualDocument, MethodDocument};
pub use filter::Filter;
pub use registry::{BuildCx, Entry, Method, MethodRef, Registry, Words, entry};
