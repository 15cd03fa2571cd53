//! The point `Reward`: how good is an answer that the model gave by itself?

mod contains;
mod exact_match;
mod multiple_choice;
mod numeric_answer;
mod overlong;
mod regex_match;

use attune_points::reward::Reward;
use attune_spec::method::{Point, Registry, entry};

/// All rules that judge answers.
pub static REWARDS: Registry<dyn Reward> = Registry::new(
    Point::Reward,
    &[
        entry::<contains::Contains>(),
        entry::<exact_match::ExactMatch>(),
        entry::<multiple_choice::MultipleChoice>(),
        entry::<numeric_answer::NumericAnswer>(),
        entry::<overlong::Overlong>(),
        entry::<regex_match::RegexMatch>(),
    ],
);
