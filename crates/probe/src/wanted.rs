//! Who wants what where: the requests of all components, each once, with the sites that it is wanted at.

use std::collections::{BTreeMap, BTreeSet};

use attune_architecture::{Place, Site, SiteId, SiteKind};
use attune_points::stats::What;
use attune_points::{Error, Result, Stats, StatsRequest};

/// The union of what some components want.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    requests: BTreeMap<StatsRequest, BTreeMap<SiteId, Site>>,
    /// Attentions by the texts of which their keys and values are wanted.
    texts: BTreeMap<Vec<u32>, BTreeSet<SiteId>>,
    /// Bytes of these.
    of_texts: u64,
}

impl Wanted {
    /// Adds what a component wants at its sites.
    ///
    /// # Errors
    /// [`Error::Refused`] for a site where it cannot be measured.
    pub fn add(&mut self, request: &StatsRequest, sites: &[Site]) -> Result<()> {
        if request.examples == 0 {
            return Err(Error::Refused(format!("{request} is nothing: expected 1 example or more")));
        }
        for site in sites {
            measurable(request, site)?;
        }
        let at = self.requests.entry(request.clone()).or_default();
        at.extend(sites.iter().map(|site| (site.id.clone(), site.clone())));
        Ok(())
    }

    /// Adds a text, as tokens, of which a component wants the keys and values at its attentions, each `width` numbers wide.
    ///
    /// # Errors
    /// [`Error::Refused`] for a text without tokens, or a site that is no attention.
    pub fn add_text(&mut self, tokens: &[u32], sites: &[Site], width: usize) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::Refused("a text without tokens has no keys and values".to_owned()));
        }
        if let Some(other) = sites.iter().find(|site| site.place != Place::Attention) {
            let message = format!("keys and values are of attentions; {} is a {}", other.id, other.kind.name());
            return Err(Error::Refused(message));
        }
        let at = self.texts.entry(tokens.to_vec()).or_default();
        let new = sites.iter().filter(|site| at.insert(site.id.clone())).count();
        self.of_texts += (8 * new * tokens.len() * width) as u64;
        Ok(())
    }

    /// What of it some statistics lack, texts and all.
    pub fn beside(mut self, stats: &Stats) -> Self {
        for (request, sites) in &mut self.requests {
            sites.retain(|site, _| stats.get(request, site).is_none());
        }
        self.requests.retain(|_, sites| !sites.is_empty());
        self
    }

    /// Whether it is wanted at a site.
    pub fn has(&self, request: &StatsRequest, site: &SiteId) -> bool {
        self.requests.get(request).is_some_and(|sites| sites.contains_key(site))
    }

    /// Whether nobody wants anything.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.texts.is_empty()
    }

    /// Each text with its attentions.
    pub fn texts(&self) -> impl Iterator<Item = (&[u32], &BTreeSet<SiteId>)> {
        self.texts.iter().map(|(tokens, sites)| (tokens.as_slice(), sites))
    }

    /// Each request with its sites.
    pub fn iter(&self) -> impl Iterator<Item = (&StatsRequest, &BTreeMap<SiteId, Site>)> {
        self.requests.iter()
    }

    /// Bytes that the sums of all of it take while they are made: four for each number of a covariance, of which sites that read
    /// the same rows share one (eight for those of one half), and four for each of a gradient, eight where those of single
    /// examples are squared, and four for each of keys and values of texts; the result takes as many.
    pub fn bytes(&self) -> u64 {
        let sums = self.requests.iter().map(|(request, sites)| bytes(request.what, sites));
        sums.sum::<u64>() + self.of_texts
    }
}

fn bytes(what: What, sites: &BTreeMap<SiteId, Site>) -> u64 {
    let widths = |site: &Site| site.out_in().map_or((0, 0), |(output, input)| (output as u64, input as u64));
    let distinct: BTreeMap<SiteId, u64> =
        sites.values().map(|site| (read_with(site, sites).clone(), widths(site).1)).collect();
    match what {
        What::InputCovariance { .. } => distinct.values().map(|input| 4 * input * (input + 3)).sum(),
        What::InputNorms { .. } => distinct.values().map(|input| 16 * input).sum(),
        What::Gradient => sites.values().map(widths).map(|(output, input)| 4 * output * input).sum(),
        // The sum, and the example's own that is being made.
        What::Fisher => sites.values().map(widths).map(|(output, input)| 8 * output * input).sum(),
    }
}

/// Refuses what cannot be measured at a site.
fn measurable(request: &StatsRequest, site: &Site) -> Result<()> {
    let SiteKind::Linear { .. } = site.kind else {
        let message = format!("{request} is of linears; {} is a {}", site.id, site.kind.name());
        return Err(Error::Refused(message));
    };
    let above = matches!(site.place, Place::Head | Place::Pooler | Place::Classifier);
    if above && !request.what.is_of_gradients() {
        let message = format!(
            "{request} is not to be had of {}: the head reads some rows at a time, and only those that are learned",
            site.id
        );
        return Err(Error::Refused(message));
    }
    Ok(())
}

/// The first of some sites that reads the rows that a site reads.
pub(crate) fn read_with<'s>(site: &'s Site, among: &'s BTreeMap<SiteId, Site>) -> &'s SiteId {
    among.values().find(|other| other.reads_with(site)).map_or(&site.id, |first| &first.id)
}

/// Which examples of the data a request is about.
pub(crate) type Selection = (u64, Option<BTreeSet<u16>>);

/// The selection of a request.
pub(crate) fn selection(request: &StatsRequest) -> Selection {
    (request.examples, request.domains.clone())
}
