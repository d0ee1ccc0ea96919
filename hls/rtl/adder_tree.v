// Sum of 2**LEVELS signed numbers. A register after each level: Yosys makes a carry chain of two operands, but LUTs of
// three and more, a third larger altogether; and a level is all that a long carry chain leaves time for.
//
// Latency: LEVELS cycles. A new set of terms every cycle.
module adder_tree #(
    parameter LEVELS = 5,
    parameter WIDTH  = 8              // of a term; the sum has WIDTH + LEVELS bits and cannot overflow
) (
    input  wire                               clk,
    input  wire [(WIDTH << LEVELS) - 1:0]     terms,
    output wire signed [WIDTH + LEVELS - 1:0] sum
);
    genvar level, i;
    generate
        for (level = 0; level <= LEVELS; level = level + 1) begin : stage
            localparam W = WIDTH + level;
            localparam N = 1 << (LEVELS - level);
            wire [W * N - 1:0] node;
        end
        assign stage[0].node = terms;
        for (level = 1; level <= LEVELS; level = level + 1) begin : add
            localparam W = WIDTH + level;
            for (i = 0; i < (1 << (LEVELS - level)); i = i + 1) begin : pair
                wire [W - 2:0] a = stage[level - 1].node[2 * i * (W - 1) +: W - 1];
                wire [W - 2:0] b = stage[level - 1].node[(2 * i + 1) * (W - 1) +: W - 1];
                reg [W - 1:0] s;
                always @(posedge clk) s <= {a[W - 2], a} + {b[W - 2], b};
                assign stage[level].node[i * W +: W] = s;
            end
        end
    endgenerate
    assign sum = stage[LEVELS].node;
endmodule
