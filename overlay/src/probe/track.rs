//! One path: what it is asked now, and what was found.
//!
//! ```text
//! waiting ──► checking ──► waiting                 the size that passes, or is promised, passes; or nothing does
//!                │  └────► searching ─┐            a limited path passes more
//!                ▼                    ▼
//!            doubting (that size) ► searching ⇄ doubting (one byte more) ──► waiting, limited
//! ```
//! An answer to a probe of the promised size leads to *verified* from everywhere.

use std::collections::VecDeque;
use std::time::Duration;

use super::chance::Chance;
use super::search::{Progress, Search};
use super::statistics::Statistics;
use super::suspicion::{Judgement, Suspicion};
use super::wire::SMALL;
use super::{ClockSkew, Report, Standing, Target};

/// Time between two tries whether a limited path passes more, as a multiple in tenths of the longest time between two checks.
const RECHECK: u32 = 18;

/// When a path wants to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Not before an outcome is known.
    Never,
    /// As a matter of course, from this time on.
    Routine(Duration),
    /// To settle a doubt, or for somebody who waits.
    Urgent(Duration),
}

/// What the paths of a node share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) chance: Chance,
    /// Longest time between two checks of a path.
    pub(super) interval: Duration,
    /// What passed on the path that was found limited last.
    pub(super) guess: Option<u32>,
    /// A path turned out not to pass what is promised.
    pub(super) alarm: bool,
}

impl Shared {
    fn recheck(&self) -> Duration {
        self.interval / 10 * RECHECK
    }
}

/// What an outcome belongs to: those of an earlier phase mean nothing to a later one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fired {
    pub(super) size: u32,
    pub(super) sent: Duration,
    phase: u64,
    /// In a doubt: the pair, and whether it is its small one.
    pair: (usize, bool),
}

#[derive(Debug)]
enum Phase {
    Waiting,
    Checking(Check),
    Doubting(Suspicion, Aim),
    Searching(Search),
}

/// Why a size is doubted.
#[derive(Debug)]
enum Aim {
    /// It passed so far, or is promised to.
    Promise,
    /// It is the end of a search.
    Byte(Search),
}

/// Probes at regular times.
#[derive(Debug)]
struct Check {
    queue: VecDeque<u32>,
    open: usize,
    /// Largest size that was answered; 0 if none was.
    best: u32,
    /// Somebody waits.
    urgent: bool,
}

/// A path.
#[derive(Debug)]
pub(super) struct Track {
    target: Target,
    standing: Standing,
    since: Duration,
    concluded: Option<Duration>,
    /// Bytes of the largest packet that passes, where less does than is promised; [`SMALL`] if the floor does not.
    limit: Option<u32>,
    phase: Phase,
    phases: u64,
    due: Due,
    /// When what is going on began. What began first is ended first: its result helps the others.
    began: Duration,
    recheck: Duration,
    statistics: Statistics,
}

impl Track {
    pub(super) fn new(target: Target, now: Duration, first: Duration) -> Self {
        Self {
            target,
            standing: Standing::Unknown,
            since: now,
            concluded: None,
            limit: None,
            phase: Phase::Waiting,
            phases: 0,
            due: Due::Routine(first),
            began: now,
            recheck: now,
            statistics: Statistics::default(),
        }
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    pub(super) fn due(&self) -> Due {
        self.due
    }

    pub(super) fn began(&self) -> Duration {
        self.began
    }

    /// What may be sent, if that is less than promised. Not below the floor: who is promised so little gets it.
    pub(super) fn limit(&self) -> Option<u32> {
        self.limit.map(|limit| limit.max(self.target.floor)).filter(|limit| *limit < self.target.promised)
    }

    pub(super) fn report(&self) -> Report {
        let passes = match self.standing {
            Standing::Verified => Some(self.target.promised),
            Standing::Searching { passes, .. } if passes > 0 => Some(passes),
            _ => self.limit,
        };
        Report {
            standing: self.standing,
            promised: self.target.promised,
            passes,
            rtt: self.statistics.rtt(),
            loss_per_mille: self.statistics.loss_per_mille(),
            clock_skew: self.statistics.clock_skew,
            sent: self.statistics.sent,
            answered: self.statistics.answered,
            since: self.since,
            concluded: self.concluded,
        }
    }

    /// The plan promises something else now: verification starts anew, and a limit that is none any more goes.
    pub(super) fn retarget(&mut self, target: Target, now: Duration, first: Duration) {
        if (self.target.address, self.target.own) != (target.address, target.own) {
            *self = Self::new(target, now, first);
            return;
        }
        self.limit = self.limit.filter(|limit| *limit < target.promised);
        self.target = target;
        self.recheck = now;
        self.stand(Standing::Unknown, now);
        self.begin(Phase::Waiting, Due::Routine(first));
    }

    /// Checks now, and looks for a limit anew.
    pub(super) fn demand(&mut self, now: Duration, shared: &Shared) {
        // Before everything that began by itself.
        self.began = Duration::ZERO;
        if matches!(self.phase, Phase::Waiting | Phase::Checking(_)) {
            if self.limit.is_some() {
                self.search(self.target.floor - 1, self.target.promised + 1, None, now);
            } else {
                self.check(true, now, shared);
                self.plan(now);
            }
        }
    }

    /// Checks now, since the same peer is limited in the other family.
    pub(super) fn hasten(&mut self, now: Duration) {
        if matches!(self.phase, Phase::Waiting) {
            self.began = now;
            self.due = Due::Urgent(now);
        }
    }

    /// The next probe to send. None if there is none after all.
    pub(super) fn fire(&mut self, now: Duration, shared: &Shared) -> Option<Fired> {
        if matches!(self.phase, Phase::Waiting) {
            self.began = now;
            self.check(matches!(self.due, Due::Urgent(_)), now, shared);
        }
        let mut pair = (0, false);
        let size = match &mut self.phase {
            Phase::Waiting => None,
            Phase::Checking(check) => check.queue.pop_front().inspect(|_| check.open += 1),
            Phase::Doubting(suspicion, _) => {
                pair = suspicion.fire(now);
                Some(if pair.1 { SMALL } else { suspicion.size })
            }
            Phase::Searching(search) => search.fire(),
        };
        self.plan(now);
        let size = size?;
        self.statistics.sent += 1;
        Some(Fired { size, sent: now, phase: self.phases, pair })
    }

    /// The outcome of a probe.
    pub(super) fn outcome(&mut self, fired: Fired, answered: bool, now: Duration, shared: &mut Shared) {
        if answered {
            self.statistics.answer(now.saturating_sub(fired.sent));
        }
        if fired.phase != self.phases {
            return;
        }
        if answered && fired.size == self.target.promised {
            return self.verify(now, shared);
        }
        match &mut self.phase {
            Phase::Waiting => {}
            Phase::Checking(check) => {
                check.open = check.open.saturating_sub(1);
                if answered {
                    check.best = check.best.max(fired.size);
                }
                let done = check.open == 0 && check.queue.is_empty();
                let best = check.best;
                let passes = self.passes();
                if fired.size <= passes {
                    if answered {
                        self.statistics.exchange(false);
                    } else {
                        self.statistics.doubt();
                    }
                }
                if done {
                    self.conclude(best, now, shared);
                }
            }
            Phase::Doubting(suspicion, aim) => {
                let (pair, small) = fired.pair;
                if small {
                    self.statistics.exchange(!answered);
                } else if matches!(aim, Aim::Promise) && !answered {
                    self.statistics.doubt();
                }
                if answered && !small {
                    return self.acquit(now, shared);
                }
                suspicion.outcome(pair, small, answered);
                match suspicion.judgement() {
                    Judgement::Open => {}
                    Judgement::Swallowed => return self.convict(now, shared),
                    Judgement::Silent => return self.fall_silent(now, shared),
                    Judgement::Undecided => return self.give_up(now, shared),
                }
            }
            Phase::Searching(search) => {
                if fired.size == SMALL {
                    self.statistics.exchange(!answered);
                }
                let progress = search.outcome(fired.size, answered);
                let high = search.high;
                match progress {
                    Progress::Going => {}
                    Progress::Narrow => self.doubt_byte(high, now),
                    Progress::Silent => return self.fall_silent(now, shared),
                    Progress::Undecided => return self.give_up(now, shared),
                }
            }
        }
        self.plan(now);
    }

    /// An answer told the peer's wall clock.
    pub(super) fn told_time(&mut self, skew: ClockSkew) {
        self.statistics.clock_skew = Some(skew);
    }

    /// The own kernel refused to send a probe: nothing can be told now.
    pub(super) fn refused(&mut self, fired: Fired, now: Duration, shared: &mut Shared) {
        self.statistics.sent = self.statistics.sent.saturating_sub(1);
        if fired.phase == self.phases {
            self.give_up(now, shared);
        }
    }

    /// Largest size that is taken to pass.
    fn passes(&self) -> u32 {
        self.limit.unwrap_or(self.target.promised)
    }

    /// The size above a limit.
    fn above(&self, limit: u32) -> u32 {
        (limit + 1).max(self.target.floor)
    }

    fn begin(&mut self, phase: Phase, due: Due) {
        self.phase = phase;
        self.phases += 1;
        self.due = due;
    }

    /// When the phase wants to send next; waiting has its time already.
    fn plan(&mut self, now: Duration) {
        let ready = |is_due: bool| if is_due { Due::Urgent(now) } else { Due::Never };
        match &self.phase {
            Phase::Waiting => {}
            Phase::Checking(check) if !check.urgent && !check.queue.is_empty() => self.due = Due::Routine(now),
            Phase::Checking(check) => self.due = ready(!check.queue.is_empty()),
            Phase::Doubting(suspicion, _) => self.due = suspicion.due().map_or(Due::Never, Due::Urgent),
            Phase::Searching(search) => {
                self.due = ready(search.is_due());
                let passes = if search.low < self.target.floor { 0 } else { search.low };
                if self.standing == Standing::Unreachable {
                    self.statistics.begin_anew();
                }
                self.standing = Standing::Searching { passes, fails: search.high };
            }
        }
    }

    fn stand(&mut self, standing: Standing, now: Duration) {
        if standing != self.standing {
            if self.standing == Standing::Unreachable {
                self.statistics.begin_anew();
            }
            self.standing = standing;
            self.since = now;
        }
    }

    fn check(&mut self, urgent: bool, now: Duration, shared: &Shared) {
        let mut queue = VecDeque::from([self.passes()]);
        if self.standing == Standing::Unreachable {
            queue.push_back(SMALL);
        }
        if let Some(limit) = self.limit
            && now >= self.recheck
        {
            let above = self.above(limit);
            let sizes: &[u32] = if above < self.target.promised { &[self.target.promised, above] } else { &[above] };
            // Twice, so that a path that has recovered is seen to have even if one in ten packets is lost.
            queue.extend([sizes, sizes].concat());
            self.recheck = now + shared.recheck();
        }
        self.begin(Phase::Checking(Check { queue, open: 0, best: 0, urgent }), Due::Never);
    }

    /// A check has ended, and this is the largest size that was answered.
    fn conclude(&mut self, best: u32, now: Duration, shared: &mut Shared) {
        let passes = self.passes();
        if best > passes {
            self.search(best, self.target.promised + 1, None, now);
        } else if best == passes {
            self.stand(self.limit.map_or(Standing::Verified, |passes| Standing::Limited { passes }), now);
            self.rest(now, shared);
        } else if best == 0 && self.standing == Standing::Unreachable {
            self.fall_silent(now, shared);
        } else {
            self.begin(Phase::Doubting(Suspicion::new(passes, now), Aim::Promise), Due::Urgent(now));
        }
    }

    fn search(&mut self, low: u32, high: u32, guess: Option<u32>, now: Duration) {
        if !matches!(self.standing, Standing::Searching { .. }) {
            self.since = now;
        }
        self.begin(Phase::Searching(Search::new(low, high, guess)), Due::Urgent(now));
        self.plan(now);
    }

    fn doubt_byte(&mut self, size: u32, now: Duration) {
        let suspicion = Suspicion::new(size, now);
        let Phase::Searching(search) = std::mem::replace(&mut self.phase, Phase::Waiting) else { return };
        self.begin(Phase::Doubting(suspicion, Aim::Byte(search)), Due::Urgent(now));
    }

    /// A size in doubt was answered.
    fn acquit(&mut self, now: Duration, shared: &mut Shared) {
        self.statistics.settle(true);
        let Phase::Doubting(suspicion, aim) = std::mem::replace(&mut self.phase, Phase::Waiting) else { return };
        match aim {
            // What is promised leads to being verified; this is the limit of a limited path.
            Aim::Promise => {
                self.statistics.exchange(false);
                self.conclude(suspicion.size, now, shared);
            }
            Aim::Byte(_) => self.search(suspicion.size, self.target.promised + 1, None, now),
        }
    }

    /// A size in doubt is swallowed.
    fn convict(&mut self, now: Duration, shared: &mut Shared) {
        self.statistics.settle(false);
        let Phase::Doubting(suspicion, aim) = std::mem::replace(&mut self.phase, Phase::Waiting) else { return };
        match aim {
            // Nothing is left to look for between what is known to pass and the floor.
            Aim::Promise if suspicion.size <= self.target.floor => self.limited(SMALL, now, shared),
            Aim::Promise => {
                shared.alarm = true;
                self.search(self.target.floor - 1, suspicion.size, shared.guess, now);
            }
            Aim::Byte(search) => {
                let passes = if search.low < self.target.floor { SMALL } else { search.low };
                self.limited(passes, now, shared);
            }
        }
    }

    fn limited(&mut self, passes: u32, now: Duration, shared: &mut Shared) {
        shared.guess = Some(passes);
        self.limit = Some(passes);
        self.recheck = now + shared.recheck();
        self.stand(Standing::Limited { passes }, now);
        self.rest(now, shared);
    }

    fn verify(&mut self, now: Duration, shared: &mut Shared) {
        self.statistics.settle(true);
        self.statistics.exchange(false);
        self.limit = None;
        self.stand(Standing::Verified, now);
        self.rest(now, shared);
    }

    fn fall_silent(&mut self, now: Duration, shared: &mut Shared) {
        self.statistics.settle(true);
        self.stand(Standing::Unreachable, now);
        self.rest(now, shared);
    }

    /// Back to what was known before.
    fn give_up(&mut self, now: Duration, shared: &mut Shared) {
        self.statistics.settle(true);
        if matches!(self.standing, Standing::Searching { .. }) {
            self.stand(self.limit.map_or(Standing::Unknown, |passes| Standing::Limited { passes }), now);
        }
        self.rest(now, shared);
    }

    /// Until the next check.
    fn rest(&mut self, now: Duration, shared: &mut Shared) {
        self.concluded = Some(now);
        let next = now + shared.chance.about(shared.interval);
        let recheck = if self.limit.is_some() { self.recheck.max(now) } else { next };
        self.begin(Phase::Waiting, Due::Routine(next.min(recheck)));
    }
}
