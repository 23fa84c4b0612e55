//! How far pulls are.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// What is being done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerStage {
    /// Waits for its turn.
    Waiting,
    /// Downloaded, verified and unpacked, in one stream.
    Downloading,
    /// Unpacked; waits for the layers below it to be committed.
    Unpacked,
    /// Committed to the store, or there from before.
    Done,
}

/// The state of one layer of a running pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerProgress {
    /// Digest of the compressed layer.
    pub digest: String,
    /// Size in bytes, as the manifest says.
    pub total: u64,
    /// Bytes received so far.
    pub done: u64,
    /// What is being done with it.
    pub stage: LayerStage,
}

/// The state of a running pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullState {
    /// The normalised reference.
    pub reference: String,
    /// The job's stage: `resolving`, `downloading layer 3/6`, `committing layer 2/6`, `recording`.
    pub stage: String,
    /// The layers, bottom first; empty until the manifest is known.
    pub layers: Vec<LayerProgress>,
    /// Sum of `total` of the layers.
    pub total: u64,
    /// Sum of `done` of the layers.
    pub done: u64,
    /// Since the pull began.
    pub running: Duration,
}

/// What a pull tells about itself while it runs.
#[derive(Debug)]
pub(crate) struct JobState {
    reference: String,
    began: Instant,
    shown: Mutex<Shown>,
}

#[derive(Debug, Default)]
struct Shown {
    stage: String,
    layers: Vec<LayerProgress>,
}

impl JobState {
    pub(crate) fn new(reference: String) -> JobState {
        let shown = Shown { stage: "resolving".to_owned(), layers: Vec::new() };
        JobState { reference, began: Instant::now(), shown: Mutex::new(shown) }
    }

    fn change(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn begin(&self, layers: Vec<LayerProgress>) {
        self.change(|shown| {
            shown.layers = layers;
            shown.name_download();
        });
    }

    pub(crate) fn received(&self, index: usize, done: u64) {
        self.change(|shown| {
            if let Some(layer) = shown.layers.get_mut(index) {
                layer.done = done;
                if layer.stage == LayerStage::Waiting {
                    layer.stage = LayerStage::Downloading;
                    shown.name_download();
                }
            }
        });
    }

    pub(crate) fn stage(&self, index: usize, stage: LayerStage) {
        self.change(|shown| {
            if let Some(layer) = shown.layers.get_mut(index) {
                layer.stage = stage;
                if matches!(stage, LayerStage::Unpacked | LayerStage::Done) {
                    layer.done = layer.total;
                }
            }
            shown.name_download();
        });
    }

    pub(crate) fn named(&self, stage: impl Into<String>) {
        let stage = stage.into();
        self.change(|shown| shown.stage = stage);
    }

    pub(crate) fn state(&self) -> PullState {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        PullState {
            reference: self.reference.clone(),
            stage: shown.stage.clone(),
            total: shown.layers.iter().map(|l| l.total).sum(),
            done: shown.layers.iter().map(|l| l.done).sum(),
            layers: shown.layers.clone(),
            running: self.began.elapsed(),
        }
    }
}

impl Shown {
    /// Names the lowest layer that is still on its way.
    fn name_download(&mut self) {
        let waiting = |l: &LayerProgress| matches!(l.stage, LayerStage::Waiting | LayerStage::Downloading);
        if let Some(at) = self.layers.iter().position(waiting) {
            self.stage = format!("downloading layer {}/{}", at + 1, self.layers.len());
        }
    }
}
