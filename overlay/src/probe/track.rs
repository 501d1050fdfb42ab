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

use super::phase::{Aim, Check, Due, Fired, Phase, Shared};
use super::search::{Progress, Search};
use super::statistics::Statistics;
use super::suspicion::{Judgement, Suspicion};
use super::wire::SMALL;
use super::{ClockSkew, Limit, Report, Standing, Target};

/// Pause after the own kernel refused the first probe of a size that is newly promised: a device may still have to follow.
const RETRY: Duration = Duration::from_secs(1);

/// A path.
#[derive(Debug)]
pub(super) struct Track {
    target: Target,
    standing: Standing,
    since: Duration,
    concluded: Option<Duration>,
    /// Bytes of the largest packet that passes, where less does than is promised; [`SMALL`] if the floor does not.
    limit: Option<u32>,
    /// The limit was not found: more was promised, and is not verified yet.
    assumed: bool,
    /// Bytes that passed when they were promised, and are not more than was promised since.
    verified: Option<u32>,
    phase: Phase,
    phases: u64,
    due: Due,
    /// When what is going on began. What began first is ended first: its result helps the others.
    began: Duration,
    recheck: Duration,
    statistics: Statistics,
}

impl Track {
    /// `known` is what an earlier daemon knew of it; that is tried anew as soon as possible.
    pub(super) fn new(target: Target, known: Option<Limit>, now: Duration, [soon, first]: [Duration; 2]) -> Self {
        let known = known.filter(|limit| limit.bytes < target.promised);
        let found = known.filter(|limit| limit.found);
        Self {
            target,
            standing: found.map_or(Standing::Unknown, |limit| Standing::Limited { passes: limit.bytes }),
            since: now,
            concluded: None,
            limit: known.map(|limit| limit.bytes),
            assumed: known.is_some() && found.is_none(),
            verified: None,
            phase: Phase::Waiting,
            phases: 0,
            due: if known.is_some() { Due::Urgent(soon) } else { Due::Routine(first) },
            began: now,
            recheck: now,
            statistics: Statistics::default(),
        }
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    pub(super) fn standing(&self) -> Standing {
        self.standing
    }

    pub(super) fn due(&self) -> Due {
        self.due
    }

    pub(super) fn began(&self) -> Duration {
        self.began
    }

    /// What may be sent, if that is less than promised. Not below the floor: who is promised so little gets it.
    pub(super) fn limit(&self) -> Option<Limit> {
        let bytes = self.limit?.max(self.target.floor);
        (bytes < self.target.promised).then_some(Limit { bytes, found: !self.assumed })
    }

    /// The limit as it will be if this is promised: what was verified so far, where more is promised. Hosts may have grown before
    /// what is between them.
    pub(super) fn limit_under(&self, target: &Target) -> Option<Limit> {
        let below = |bytes: &u32| *bytes < target.promised;
        if !self.leads_to(target) {
            return None;
        }
        let known = self.limit.filter(below).map(|bytes| Limit { bytes, found: !self.assumed });
        let known = known.or(self.verified.filter(below).map(|bytes| Limit { bytes, found: false }))?;
        let bytes = known.bytes.max(target.floor);
        below(&bytes).then_some(Limit { bytes, ..known })
    }

    fn leads_to(&self, target: &Target) -> bool {
        (self.target.address, self.target.own) == (target.address, target.own)
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

    /// The plan promises something else now: verification starts anew, and a limit that is none any more goes. What is promised
    /// beyond what was verified is not used before it is, either.
    pub(super) fn retarget(&mut self, target: Target, now: Duration, first: Duration) {
        if !self.leads_to(&target) {
            // Answers from the old address are none from the new one.
            let phases = self.phases + 1;
            *self = Self { phases, ..Self::new(target, None, now, [first; 2]) };
            return;
        }
        let limit = self.limit_under(&target);
        self.limit = limit.map(|limit| if limit.found { self.limit.unwrap_or(limit.bytes) } else { limit.bytes });
        self.assumed = limit.is_some_and(|limit| !limit.found);
        self.verified = self.verified.map(|verified| verified.min(target.promised));
        self.target = target;
        self.recheck = now;
        self.stand(Standing::Unknown, now);
        self.began = now;
        self.begin(Phase::Waiting, if self.assumed { Due::Urgent(now) } else { Due::Routine(first) });
    }

    /// The peer's other family, which goes the same way, was found to pass no more than this.
    pub(super) fn follow(&mut self, passes: u32, now: Duration, shared: &mut Shared) {
        let known = self.limit == Some(passes) && !self.assumed;
        // What is too little for the other family need not be for this one: it finds that out by itself.
        if known || passes == SMALL || passes >= self.target.promised || self.standing == Standing::Unreachable {
            return;
        }
        self.statistics.settle(false);
        self.limited(if passes < self.target.floor { SMALL } else { passes }, now, shared);
    }

    /// Checks now, and looks for a limit anew. Where nothing was answered lately there is no size to look for: a search would say
    /// of a dead path that it is being searched, as often as somebody asks.
    pub(super) fn demand(&mut self, now: Duration, shared: &Shared) {
        // Before everything that began by itself.
        self.began = Duration::ZERO;
        if matches!(self.phase, Phase::Waiting | Phase::Checking(_)) {
            if self.limit.is_some() && self.standing != Standing::Unreachable {
                self.search(self.target.floor - 1, self.target.promised + 1, None, now);
            } else {
                // What is above a limit is tried with it.
                self.recheck = now;
                self.check(true, now, shared);
                self.plan(now);
            }
        }
    }

    /// Nothing has been answered since this time, which is time since boot; none of a path that answers, or is not known to.
    pub(super) fn silent_since(&self) -> Option<Duration> {
        (self.standing == Standing::Unreachable).then_some(self.since)
    }

    /// Checks now, since the same peer is limited in the other family, or no longer is.
    pub(super) fn hasten(&mut self, now: Duration) {
        if matches!(self.phase, Phase::Waiting) {
            self.recheck = now;
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
                if answered && search.guess == Some(fired.size) {
                    // Larger ones are known to vanish. The search may find that some more passes.
                    (self.limit, self.assumed) = (Some(fired.size), false);
                }
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
            if self.assumed {
                self.due = Due::Urgent(now + RETRY);
            }
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
        let passes = self.passes();
        let mut queue =
            if self.assumed { VecDeque::from([self.target.promised, passes]) } else { VecDeque::from([passes]) };
        if self.standing == Standing::Unreachable {
            queue.push_back(SMALL);
        }
        if let Some(limit) = self.limit
            && !self.assumed
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
        } else if best == passes && !self.assumed {
            self.stand(self.limit.map_or(Standing::Verified, |passes| Standing::Limited { passes }), now);
            self.rest(now, shared);
        } else if best == 0 && self.standing == Standing::Unreachable {
            self.fall_silent(now, shared);
        } else {
            let doubted = if self.assumed { self.target.promised } else { passes };
            self.begin(Phase::Doubting(Suspicion::new(doubted, now), Aim::Promise), Due::Urgent(now));
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
        shared.limited = self.target.tunnelled.then_some(passes);
        (self.limit, self.assumed) = (Some(passes), false);
        self.recheck = now + shared.recheck();
        self.stand(Standing::Limited { passes }, now);
        self.rest(now, shared);
    }

    fn verify(&mut self, now: Duration, shared: &mut Shared) {
        self.statistics.settle(true);
        self.statistics.exchange(false);
        shared.alarm |= self.limit.is_some() && !self.assumed;
        (self.limit, self.assumed) = (None, false);
        self.verified = Some(self.target.promised);
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
            let found = self.limit.filter(|_| !self.assumed);
            self.stand(found.map_or(Standing::Unknown, |passes| Standing::Limited { passes }), now);
        }
        self.rest(now, shared);
    }

    /// Until the next check.
    fn rest(&mut self, now: Duration, shared: &mut Shared) {
        self.concluded = Some(now);
        let next = now + shared.chance.about(shared.interval);
        let recheck = if self.limit.is_some() && !self.assumed { self.recheck.max(now) } else { next };
        self.begin(Phase::Waiting, Due::Routine(next.min(recheck)));
    }
}
