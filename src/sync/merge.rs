//! Merges the documents of several tokens into one.
//!
//! If several tokens see a project, the newest of their states is published. This module does not decide
//! which one that is (`token_precedence` does) and not which documents count (`fetched_documents` does).

use std::{collections::HashMap, sync::Arc};

use super::document_parts::DocumentPart;
use crate::{
    protocol::features::{Document, Feature, Segment},
    token::Projects,
};

/// The input of [`merge`].
#[derive(Debug)]
pub(super) struct MergeInput {
    pub(super) views: Vec<TokenView>,
    /// The index of the view with the newest state; empty if there is only one view.
    pub(super) leaders: HashMap<DocumentPart, usize>,
    /// Flags that are published unless a view contains them.
    pub(super) deferred_removals: Vec<Arc<Document>>,
}

/// The flags that a token sees.
#[derive(Clone, Debug)]
pub(super) struct TokenView {
    pub(super) projects: Projects,
    pub(super) document: Arc<Document>,
    /// The token once saw more projects: flags of other projects are not its own.
    pub(super) is_narrowed: bool,
    /// The sequence number of the token's first document.
    initial_sequence: u64,
    /// The sequence number of the document in which a flag appeared, if it was not in the first.
    flag_sequences: Arc<HashMap<Arc<str>, u64>>,
}

impl TokenView {
    /// The first document of a token, with its sequence number.
    pub(super) fn new(projects: Projects, document: Arc<Document>, sequence: u64) -> Self {
        Self {
            projects,
            document,
            is_narrowed: false,
            initial_sequence: sequence,
            flag_sequences: Arc::default(),
        }
    }

    /// The next document of the same token, with its sequence number.
    pub(super) fn next(&self, projects: Projects, document: Arc<Document>, sequence: u64) -> Self {
        let sequence_of = |feature: &Feature| {
            let known = self.document.feature(feature.name());
            let stays = known.is_some_and(|known| known.project() == feature.project());
            if stays { self.flag_sequences.get(feature.name()).copied() } else { Some(sequence) }
        };
        let features = document.features().iter();
        let flag_sequences =
            features.filter_map(|it| Some((Arc::clone(it.name()), sequence_of(it)?))).collect();
        Self {
            flag_sequences: Arc::new(flag_sequences),
            initial_sequence: self.initial_sequence,
            ..Self::new(projects, document, sequence)
        }
    }

    /// Whether a flag of a project without a leader may be published.
    fn can_publish(&self, project: &str) -> bool {
        !self.is_narrowed || self.projects.contains(project)
    }

    fn sequence_of(&self, name: &str) -> u64 {
        self.flag_sequences.get(name).copied().unwrap_or(self.initial_sequence)
    }
}

/// The union of all views: of each project and segment the newest state, and of two flags with the same
/// name the one that appeared later.
pub(super) fn merge(MergeInput { views, leaders, deferred_removals }: &MergeInput) -> Document {
    let leads = |at: usize, feature: &Feature| match leaders
        .get(&DocumentPart::Project(Arc::clone(feature.project())))
    {
        Some(leader) => *leader == at,
        None => views[at].can_publish(feature.project()),
    };
    let mut latest = HashMap::<&str, (u64, usize)>::new();
    if views.len() > 1 {
        for (at, view) in views.iter().enumerate() {
            for feature in view.document.features().iter().filter(|it| leads(at, it)) {
                let appeared = (view.sequence_of(feature.name()), at);
                let latest = latest.entry(feature.name()).or_insert(appeared);
                *latest = appeared.max(*latest);
            }
        }
    }
    let newest = views.iter().enumerate().map(|(at, view)| {
        let has_feature = |feature: &Feature| {
            leads(at, feature) && latest.get(&**feature.name()).is_none_or(|it| it.1 == at)
        };
        let has_segment = |segment: &Segment| {
            leaders.get(&DocumentPart::Segment(segment.id())).is_none_or(|leader| *leader == at)
        };
        view.document.filter(has_feature, has_segment)
    });
    // In a merge later documents win, so deferred removals come first.
    let deferred = deferred_removals.iter().map(|document| Document::clone(document));
    Document::union(deferred.chain(newest))
}
