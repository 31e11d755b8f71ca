// mod_block and select_channels: the launches of a plan, one after the other.
#include <algorithm>
#include <vector>

#include "cases.h"
#include "cuda/mod_block.cuh"
#include "cuda/plan.h"

namespace cases {
namespace {

using namespace mod_kernels;

Architecture architecture(const Case& one) {
  Architecture device;
  device.capability = static_cast<int>(one.number("capability"));
  device.multiprocessors = static_cast<int>(one.number("multiprocessors"));
  device.shared_bytes = static_cast<int>(one.number("shared_bytes"));
  device.max_cluster = static_cast<int>(one.number("max_cluster"));
  BlockTuning& tuning = device.tuning;
  const auto choose = [&](const char* name, int& value) {
    if (one.numbers.contains(name)) value = static_cast<int>(one.number(name));
  };
  choose("stage_bytes", tuning.stage_bytes);
  choose("ring_bytes", tuning.ring_bytes);
  choose("lone_ring_bytes", tuning.lone_ring_bytes);
  choose("group_bytes", tuning.group_bytes);
  choose("least_bytes", tuning.least_bytes);
  choose("one_launch_weights", tuning.one_launch_weights);
  choose("slice_channels", tuning.slice_channels);
  return device;
}

SelectorParameter parameter(const Case& one, const std::string& name) {
  return {one.data<const void>(name), one.number("float_weights") != 0};
}

// y is x where the case has none and is in place.
BlockCall call_of(const Case& one) {
  BlockCall call;
  call.dtype = static_cast<DType>(one.number("dtype"));
  call.x = one.data("x");
  call.stride_xn = one.number("x_stride_n");
  if (one.tensor("y") != nullptr) {
    call.y = one.data("y");
    call.stride_yn = one.number("y_stride_n");
  } else if (one.number("in_place") != 0) {
    call.y = one.data("x");
    call.stride_yn = call.stride_xn;
  }
  call.n = one.number("n");
  call.c = one.number("c");
  call.h = one.number("h");
  call.w = one.number("w");
  call.channels_last = one.number("channels_last") != 0;
  call.r = one.number("r");
  call.k = one.number("k");
  call.fc1_weight = parameter(one, "fc1_weight");
  call.fc2_weight = parameter(one, "fc2_weight");
  call.fc1_bias = parameter(one, "fc1_bias");
  call.fc2_bias = parameter(one, "fc2_bias");
  call.pooled = one.data<const float>("pooled");
  call.logits = one.data<float>("logits");
  call.hidden = one.data<float>("hidden");
  call.pooled_out = one.data<float>("pooled_out");
  call.scores = one.data<float>("scores");
  call.index = one.data<int64_t>("index");
  call.conv = one.data<const float>("conv");
  call.form.kind = static_cast<BlockKind>(one.number("kind"));
  call.form.mid_channels = one.number("mid_channels");
  call.form.final_relu = one.number("final_relu") != 0;
  call.form.position = static_cast<Position>(one.number("position"));
  call.counters = one.data<int32_t>("counters");
  return call;
}

// Instead of one workspace, a piece of memory of its own for all that the plan puts there, so that what is
// beyond its end is seen. What each takes must fit where the plan has it.
struct Workspace {
  struct Section {
    int64_t begin, bytes;
  };
  const Case& one;
  const BlockPlan& plan;
  std::vector<Section> sections;

  template <class T>
  void place(T*& pointer, const char* name, int64_t begin, int64_t count) {
    if (begin < 0) return;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    sections.push_back({begin, bytes});
    pointer = static_cast<T*>(one.scratch(name, static_cast<size_t>(bytes)));
  }
  void place_all(BlockParameters& p) {
    const int64_t n = p.n, hw = int64_t{p.h} * p.w;
    sections.clear();
    place(p.planes_a, "planes_a", plan.planes_a, n * p.planes_a_count * hw);
    place(p.planes_b, "planes_b", plan.planes_b, n * p.planes_b_count * hw);
    place(p.slots, "slots", plan.slots, n * p.groups * p.r);
    place(p.logits, "logits of the plan", plan.logits, n * p.c);
    place(p.scores, "scores of the plan", plan.scores, n * p.k);
    place(p.index, "index of the plan", plan.index, n * p.k);
  }
  const char* wrong() {
    std::sort(sections.begin(), sections.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
    for (size_t i = 0; i < sections.size(); ++i) {
      const int64_t end = i + 1 < sections.size() ? sections[i + 1].begin : plan.workspace_bytes;
      if (sections[i].begin + sections[i].bytes > end) return "the plan's workspace is too small";
    }
    return nullptr;
  }
};

template <class T>
const char* run_plan(const Case& one, const BlockPlan& plan) {
  Workspace workspace{one, plan, {}};
  for (int i = 0; i < plan.count; ++i) {
    const BlockLaunch& launch = plan.launches[i];
    BlockParameters p = launch_parameters(plan, i, nullptr);
    workspace.place_all(p);
    if (const char* wrong = workspace.wrong()) return wrong;
    const cuda_host::Launch config{.grid = static_cast<unsigned>(p.n * launch.blocks_a_sample),
                                   .threads = kBlockThreads,
                                   .cluster = std::max(1, launch.cluster),
                                   .shared_bytes = static_cast<size_t>(launch.shared_bytes),
                                   .order = one.order,
                                   .seed = one.seed};
    if (launch.is_step) {
      cuda_host::launch(config, tail_step_kernel<T>, p, launch.step);
    } else if (launch.cluster > 0) {
      cuda_host::launch(config, mod_block_kernel<T, true>, p);
    } else {
      cuda_host::launch(config, mod_block_kernel<T, false>, p);
    }
  }
  return nullptr;
}

std::string block(const Case& one) {
  const BlockPlan plan = plan_block(call_of(one), architecture(one));
  if (plan.refused != nullptr) return plan.refused;
  if (plan.count > 0 && plan.uses_counters != (one.tensor("counters") != nullptr))
    return "counters: not as planned";
  return for_dtype(one, [&]<class T>() { return run_plan<T>(one, plan); });
}

// How the plan does it, in place of the result: for a test to see that its cases are what it means them to
// be.
std::string plan(const Case& one) {
  const BlockPlan made = plan_block(call_of(one), architecture(one));
  if (made.refused != nullptr) return made.refused;
  std::string words = "plan:";
  for (int i = 0; i < made.count; ++i) {
    const BlockLaunch& launch = made.launches[i];
    words += launch.is_step                  ? " step"
             : launch.cluster > 0            ? " cluster"
             : launch.phase == Phase::kWhole ? " whole"
             : launch.phase == Phase::kPool  ? " pool"
                                             : " rank";
    words += " " + std::to_string(launch.blocks_a_sample) + ",";
  }
  const BlockParameters& p = made.parameters;
  return words + " pooling " + std::to_string(static_cast<int>(p.pooling)) + " stages " +
         std::to_string(p.stages) + " groups " + std::to_string(p.groups) + " of " +
         std::to_string(p.block_groups);
}

const Known kBlock("block", block), kPlan("plan", plan);

}  // namespace
}  // namespace cases
