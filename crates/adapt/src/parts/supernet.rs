//! Which parts of a component may be left in the end, and which are: ranks from the largest down, widths from the whole one down.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Place, Site, SiteKind};
use attune_spec::Fault;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is left in the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Left {
    /// The one in the middle of all.
    #[default]
    Middle,
    /// The largest, all of it.
    Largest,
    /// The smallest.
    Smallest,
    /// Of each group the one that a search among all of them finds.
    Searched,
}

impl Left {
    /// Which of some that come with the largest first; of those that are searched for the one in the middle, which the search begins with.
    pub(crate) fn of(self, all: &[usize]) -> Option<usize> {
        let at = match self {
            Self::Middle | Self::Searched => all.len().saturating_sub(1) / 2,
            Self::Largest => 0,
            Self::Smallest => all.len().saturating_sub(1),
        };
        all.get(at).copied()
    }
}

/// The ranks of a component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ranks {
    /// The largest.
    pub(crate) rank: u32,
    /// From one to the next.
    pub(crate) step: u32,
    /// None is smaller.
    pub(crate) smallest: u32,
    /// Which one is left at most sites.
    pub(crate) left: Left,
    /// The one that is left at single sites.
    pub(crate) at: BTreeMap<String, u32>,
}

impl Ranks {
    /// All of them, the largest first.
    pub(crate) fn all(&self) -> Vec<usize> {
        let all = (0..).map_while(|n| self.rank.checked_sub(n * self.step));
        all.take_while(|rank| *rank >= self.smallest).map(|rank| rank as usize).collect()
    }

    /// The one that is left in the end at most sites.
    pub(crate) fn last(&self) -> usize {
        self.left.of(&self.all()).unwrap_or(self.rank as usize)
    }

    /// The one that is left at a site.
    pub(crate) fn left_at(&self, site: &str) -> usize {
        self.at.get(site).map_or_else(|| self.last(), |rank| *rank as usize)
    }

    /// What is wrong with the ranks of single sites.
    pub(crate) fn faults(&self, sites: &[Site]) -> Vec<Fault> {
        let all = self.all();
        let fault = |message: String| Fault::new("ranks", message);
        let mut faults = Vec::new();
        if self.left == Left::Searched && !self.at.is_empty() {
            faults
                .push(fault("says what is left, which is searched for: leave it out, or `left: searched`".to_owned()));
        }
        for (path, rank) in &self.at {
            let Some(site) = sites.iter().find(|site| site.id.as_str() == path) else {
                faults.push(fault(format!("names {path:?}, which is none of its sites")));
                continue;
            };
            if !all.contains(&(*rank as usize)) {
                faults.push(fault(format!("has {rank} for {path:?}; expected one of {all:?}")));
            }
            let beside =
                sites.iter().find(|other| other.reads_with(site) && self.left_at(other.id.as_str()) != *rank as usize);
            if let Some(other) = beside {
                let message = format!(
                    "has {rank} for {path:?}, and {} for {}, which reads the same rows: expected the same rank for both",
                    self.left_at(other.id.as_str()),
                    other.id
                );
                faults.push(fault(message));
            }
        }
        faults
    }
}

/// So many widths of an MLP of so many channels, equally far apart, from the whole one down to the share `narrowest` of it.
pub(crate) fn widths(channels: usize, narrowest: f64, count: u32) -> Vec<usize> {
    let last = f64::from(count.max(2) - 1);
    let share = |n: u32| 1.0 - (1.0 - narrowest) * f64::from(n) / last;
    let mut all: Vec<usize> = (0..count).map(|n| ((share(n) * channels as f64).round() as usize).max(1)).collect();
    all.dedup();
    all
}

/// What is known of a site beside its shape.
#[derive(Debug, Clone)]
pub(crate) struct About {
    /// The first of the sites that reads what it does.
    pub(crate) group: String,
    /// Numbers of a channel of the MLP that it leads into, in all of its weights.
    pub(crate) channel: u64,
}

/// That of each of some sites.
pub(crate) fn about(sites: &[Site], arch: &Architecture) -> BTreeMap<String, About> {
    let first = |site: &Site| sites.iter().find(|other| other.reads_with(site)).unwrap_or(site).id.to_string();
    let about = |site: &Site| About { group: first(site), channel: channel(site, arch) };
    sites.iter().map(|site| (site.id.to_string(), about(site))).collect()
}

/// Numbers of a channel that a linear gives to an MLP: in all of the MLP's weights, those that make it and those that read it.
fn channel(site: &Site, arch: &Architecture) -> u64 {
    let module = |path: &str| path.rsplit_once('.').map(|(module, _)| module.to_owned());
    let of_mlp = arch.sites().into_iter().filter(|other| module(other.id.as_str()) == module(site.id.as_str()));
    let numbers = of_mlp.map(|other| match (other.kind, other.place) {
        (SiteKind::Linear { input, .. }, Place::Up | Place::Gate) => input,
        (SiteKind::Linear { output, .. }, Place::Down) => output,
        _ => 0,
    });
    numbers.map(|number| number as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(rank: u32, step: u32, smallest: u32, left: Left) -> Ranks {
        Ranks { rank, step, smallest, left, at: BTreeMap::new() }
    }

    #[test]
    fn ranks_go_down_by_steps_and_the_one_in_the_middle_is_left() {
        for (ranks, all, last) in [
            (ranks(32, 8, 16, Left::Middle), vec![32, 24, 16], 24),
            (ranks(32, 4, 28, Left::Middle), vec![32, 28], 32),
            (ranks(8, 3, 1, Left::Smallest), vec![8, 5, 2], 2),
            (ranks(4, 1, 1, Left::Largest), vec![4, 3, 2, 1], 4),
            (ranks(4, 9, 4, Left::Middle), vec![4], 4),
            (ranks(4, 1, 1, Left::Searched), vec![4, 3, 2, 1], 3),
        ] {
            assert_eq!((ranks.all(), ranks.last()), (all, last));
        }
        let own = Ranks { at: BTreeMap::from([("up".to_owned(), 16)]), ..ranks(32, 8, 16, Left::Middle) };
        assert_eq!((own.left_at("up"), own.left_at("elsewhere")), (16, 24));
        assert_eq!(widths(11008, 0.5, 5), [11008, 9632, 8256, 6880, 5504]);
    }

    #[test]
    fn what_is_searched_for_is_not_said() {
        let both = Ranks { at: BTreeMap::from([("up".to_owned(), 2)]), ..ranks(4, 1, 1, Left::Searched) };
        assert!(both.faults(&[])[0].message.contains("which is searched for"));
        assert!(ranks(4, 1, 1, Left::Searched).faults(&[]).is_empty());
    }
}
